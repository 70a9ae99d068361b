#define FG_ISA baseline
#include "rasterize_tiles.h"
