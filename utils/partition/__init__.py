"""Which part of a model each rank of a run holds, and how the parts work together: tensor and pipeline parallel."""
