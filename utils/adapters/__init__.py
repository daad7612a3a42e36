"""Small trainable parts on a frozen model: LoRA and prefix tuning.

`check`, `targets` and `*_files` load no Paddle, so that a wrong adapter is reported before anything slow starts.
"""
