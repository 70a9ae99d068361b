#define FG_ISA avx2
#include "mlp_kernels.h"
