"""Model folders: found, checked, read, written, converted. This face of the package loads no Paddle."""

from utils.checkpoints.fingerprint import fingerprint
from utils.checkpoints.locate import Checkpoint, locate

__all__ = ["Checkpoint", "fingerprint", "locate"]
