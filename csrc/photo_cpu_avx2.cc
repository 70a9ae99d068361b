#define FG_ISA avx2
#include "photo_kernels.h"
