"""The mechanisms behind the stages of Whisper distillation: one noun per module, no argument parsing inside."""
