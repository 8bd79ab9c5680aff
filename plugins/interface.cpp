#include "interface.h"

int stg_kernels_abi(void) { return STG_KERNELS_ABI; }
