#define FG_ISA avx2
#include "rasterize_paint.h"
