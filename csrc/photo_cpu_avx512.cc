#define FG_ISA avx512
#include "photo_kernels.h"
