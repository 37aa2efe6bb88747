"""Run forward passes of the frozen encoder, within the memory and the cores of one device."""
