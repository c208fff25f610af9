"""Changes of parameters that preserve the function: scales, rotations, biases.

scale_pairs       which scales can move from one parameter to another; rescale moves one
smoothquant, awq, equalize   choose such scales, before weights are quantized
rotation_groups   which orthogonal matrices can move into parameters; rotate, learn_rotations, fold_gains
precondition      the function with weights in another basis, where no scale can move; precondition_params
smooth_bases, awq_bases, rotation_bases   choose such bases
biases            which biases a weight's outputs go through; correct_bias takes the error of the mean out of them
"""

from jaxquant.transform.analysis.biases import biases
from jaxquant.transform.analysis.rotations import rotation_groups
from jaxquant.transform.analysis.scales import scale_pairs
from jaxquant.transform.change_of_basis import precondition, precondition_params
from jaxquant.transform.folding import correct_bias, fold_gains, rescale, rotate
from jaxquant.transform.learning import learn_rotations
from jaxquant.transform.smoothing import awq, awq_bases, equalize, rotation_bases, smooth_bases, smoothquant

__all__ = [
    "awq",
    "awq_bases",
    "biases",
    "correct_bias",
    "equalize",
    "fold_gains",
    "learn_rotations",
    "precondition",
    "precondition_params",
    "rescale",
    "rotate",
    "rotation_bases",
    "rotation_groups",
    "scale_pairs",
    "smooth_bases",
    "smoothquant",
]
