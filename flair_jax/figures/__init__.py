"""Pictures of results, a module per task: arrays -> PIL images."""
