"""How a damped Gram is inverted or solved with: the plan of a call, conjugate gradients, process groups."""
