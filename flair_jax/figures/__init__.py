"""Pictures of what evaluators found: arrays -> PIL images, a module per task."""
