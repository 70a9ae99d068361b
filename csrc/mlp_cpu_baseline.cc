#define FG_ISA baseline
#include "mlp_kernels.h"
