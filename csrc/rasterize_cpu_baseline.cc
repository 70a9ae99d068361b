#define FG_ISA baseline
#include "rasterize_paint.h"
