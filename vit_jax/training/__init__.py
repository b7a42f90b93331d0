"""The train step, the loop around it, and where a run goes on."""
