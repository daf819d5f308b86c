"""`mindspeed-mm doctor`: what this host brings, and whether its device computes what the CPU computes."""
