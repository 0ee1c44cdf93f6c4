"""How several processes act as one."""
