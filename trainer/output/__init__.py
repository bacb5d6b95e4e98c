"""What a run writes: its output folder, its checkpoints and its model folder."""
