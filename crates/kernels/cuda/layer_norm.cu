// LayerNorm of rows.
#include "row_norm.cuh"

NORM(layer_norm, LayerNorm)
