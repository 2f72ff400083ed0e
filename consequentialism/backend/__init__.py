"""The ops on every kind of device, and the choice of the one that serves a call."""
