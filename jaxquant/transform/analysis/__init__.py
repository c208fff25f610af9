"""Static analyses: properties of every value of a function, found from its trace alone.

axes       an axis in pieces: through a reshape, and cut at the same places as another one
walk       one walk over a jaxpr, through calls and scans, with one rule for each primitive
flow       which axes of its operands an operation keeps, and where
equations  unknowns on the axes of parameters, and the rules that are the same whatever is unknown
scales     `scale_pairs`: positive scales that can move from one parameter to another
rotations  `rotation_groups`: orthogonal matrices that can turn several parameters together
rows       activations that are computed a row at a time before a product
biases     `biases`: the parameter that is added to a weight's product
"""
