"""."""
def check_training(o, world_size): return iter(())
def warn_training(o): return iter(())
