"""Attention in bfloat16 on a CPU: torch's fused kernel reaches half of the rate of plain matrix products there, and a
quarter for one query (seen on an AMD EPYC; benchmarks/labelling.py measures the whole).

Products round the scores to bfloat16, as transformers' "eager" attention does; the fused kernel keeps them in float32.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_PRODUCTS = "matrix_products"  # its name in transformers
QUERIES_AT_ONCE = 250  # their scores then stay in a core's cache
BFLOAT16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))  # without it no product of bfloat16 is fast
AMX = bool(torch.cpu.get_capabilities().get("amx_tile"))  # with it the fused kernel should be fast for many queries


def for_any_length():
    """Around a search whose keys grow with each step: cuDNN, which torch prefers on an H100, and which is the fastest
    there, makes a plan for each length."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def attend(queries, keys, values, mask: torch.Tensor | None = None, causal: bool = False) -> torch.Tensor:
    """What queries find [batch, heads, length, width] in values, whose keys they multiply; queries come scaled.

    mask: what is added to the scores of the few tokens of a step of the decoder, in the type of the queries.
    """
    products = BFLOAT16 and queries.device.type == "cpu" and queries.dtype == torch.bfloat16
    if causal or not products or (AMX and queries.shape[2] > QUERIES_AT_ONCE):
        return scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal, scale=1.0)
    if mask is not None:  # of a few tokens: what a row finds is the same with it and without
        return torch.softmax(queries @ keys.mT + mask, -1) @ values
    keys = keys.mT
    return torch.cat([torch.softmax(some @ keys, -1) @ values for some in queries.split(QUERIES_AT_ONCE, 2)], 2)


def _forward(module, query, key, value, attention_mask, dropout=0.0, scaling=1.0, is_causal=None, **options):
    """`attend` as transformers calls it; with gradients, which would keep all scores, torch's kernel."""
    causal = query.shape[2] > 1 and (module.is_causal if is_causal is None else is_causal)
    if attention_mask is not None or causal or dropout or torch.is_grad_enabled():
        options |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return attend(query * scaling, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(BY_PRODUCTS, _forward)
AttentionMaskInterface.register(BY_PRODUCTS, sdpa_mask)
