#define FG_ISA baseline
#include "photo_kernels.h"
