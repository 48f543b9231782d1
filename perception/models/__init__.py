"""Networks: the flagship BEVTransformer and the parts it is made of."""
