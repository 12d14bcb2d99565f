"""Train a student on random tokens for some steps, on as many threads as OMP_NUM_THREADS says; save its weights."""

import sys

import torch
from safetensors.torch import save_file

from distil_whisper.audio import LogMel
from distil_whisper.distiller import Distiller
from distil_whisper.losses import LossWeights
from distil_whisper.models import load_whisper

ROWS, LENGTH, STEPS = 64, 40, 4  # enough for threads to share the work on a gradient

student, saved = sys.argv[1:]
whisper = load_whisper(student, device="cpu")
distiller = Distiller(whisper.model, LogMel(whisper.feature_extractor), LossWeights(kl=0.0)).train()
optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3, fused=True)
draw = torch.Generator().manual_seed(0)
states = torch.randn(ROWS, 4, whisper.model.config.d_model, generator=draw)
for _ in range(STEPS):
    ids = torch.randint(0, 200, (ROWS, LENGTH), generator=draw)
    losses = distiller(torch.zeros(ROWS, 0), ids, ids, torch.arange(ids.numel()), encoder_states=states)
    (losses["loss"] / ids.numel()).backward()
    optimizer.step()
    optimizer.zero_grad()
save_file({name: weight.detach() for name, weight in distiller.named_parameters()}, saved)
