#define FG_ISA avx512
#include "rasterize_paint.h"
