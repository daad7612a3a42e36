"""Small trainable parts on a frozen model: LoRA and prefix tuning.

`check` loads no Paddle, so that a wrong adapter is reported before anything slow starts.
"""
