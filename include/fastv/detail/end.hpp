// fastv: no #pragma once. Last thing in every header: gives those macros back.
#pragma pop_macro("check")
#pragma pop_macro("Status")
