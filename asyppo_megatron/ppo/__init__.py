"""The maths of AsyPPO and its family: masks, advantages, losses and targets, on torch and `types` alone."""
