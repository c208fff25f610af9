"""Where the error is: a float function and its quantized form side by side, as numbers, plots and one page.

compare   `compare` and `Comparison`: the numbers, as a table and as JSON
page      the same as one self-contained HTML file
plots     the same as pictures
"""

from jaxquant.report.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
