// The CPU engine with the vectors that every machine of its kind has, SSE2 or NEON: 16 registers of 16 bytes.
#define ISQRT_LEVEL portable
#define ISQRT_VECTOR_BYTES 16
#define ISQRT_TILE_ROWS 4
#define ISQRT_TILE_VECTORS 2
#define ISQRT_TILE_STEPS 1
#include "level.h"
