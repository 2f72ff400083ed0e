"""What autograd keeps of an emended layer's forward, and the gradients that backward makes of it."""
