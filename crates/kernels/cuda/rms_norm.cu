// Root-mean-square normalization of rows.
#include "row_norm.cuh"

NORM(rms_norm, RmsNorm)
