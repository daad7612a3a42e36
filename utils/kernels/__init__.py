"""The one Python face over fused operators: Paddle's own on GPUs, plain Paddle on CPUs."""
