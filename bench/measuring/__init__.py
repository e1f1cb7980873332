"""Times, memory and the machine: what every benchmark measures with."""
