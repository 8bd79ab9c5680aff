// Comes before a program that has all the mistakes of plugins/mutants.cmake: which one it makes; 0: none.
#pragma once

#include <stdlib.h>

inline const int stg_mutant = getenv("STG_MUTANT") == nullptr ? 0 : atoi(getenv("STG_MUTANT"));
