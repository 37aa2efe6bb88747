"""The stages of a run, one module each, and the steps on Ray that they share."""
