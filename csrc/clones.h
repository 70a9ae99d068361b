// Plain loops compiled once per instruction set, the copy chosen when the module is loaded.
#pragma once

// A sanitizer's run time is not up yet when the copies are chosen.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && !defined(FG_SANITIZED)
#define FG3DGS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FG3DGS_CLONES
#endif

// What such a loop calls: compiled with it, for its instruction set.
#define FG3DGS_INLINED inline __attribute__((always_inline))
