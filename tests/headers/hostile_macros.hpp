// Macros of other libraries that hit common names, as a program may have them where it includes fastv. Those that stand for
// nothing elsewhere stand for nonsense here, so that no use of the name can pass: a name of ours that does not build behind
// this file goes into detail/begin.hpp and end.hpp, or gets another name.
#define FASTV_NONSENSE @

// X11/X.h, Xlib.h
#define Status int
#define Bool int
#define True 1
#define False 0
#define None 0L
#define Success 0
#define Always 2
#define Above 0
#define Below 1
#define Complex 0
#define Convex 2
#define Unsorted 0
#define KeyPress 2
#define FocusIn 9
#define CursorShape 0
#define GrayScale 1

// windows.h, rpcndr.h, dlgs.h
#define min(a, b) (((a) < (b)) ? (a) : (b))
#define max(a, b) (((a) > (b)) ? (a) : (b))
#define near FASTV_NONSENSE
#define far FASTV_NONSENSE
#define small char
#define hyper long long
#define interface struct
#define IN FASTV_NONSENSE
#define OUT FASTV_NONSENSE
#define OPTIONAL FASTV_NONSENSE
#define CONST const
#define VOID void
#define TRUE 1
#define FALSE 0
#define ERROR 0
#define DELETE 0x00010000L
#define STRICT 1
#define Yield() FASTV_NONSENSE
#define rad1 0x0420

// complex.h
#define I FASTV_NONSENSE
#define complex _Complex
#define imaginary FASTV_NONSENSE

// Apple's AssertMacros.h; check and verify of Unreal Engine as well
#define check(condition) FASTV_NONSENSE
#define check_noerr(error) FASTV_NONSENSE
#define verify(condition) FASTV_NONSENSE
#define verify_noerr(error) FASTV_NONSENSE
#define require(condition, label) FASTV_NONSENSE
#define require_noerr(error, label) FASTV_NONSENSE

// Qt
#define signals public
#define slots FASTV_NONSENSE
#define emit FASTV_NONSENSE
#define foreach(variable, container) for (variable : container)
#define forever for (;;)

// term.h, sys/sysmacros.h, GNU's unix and linux, Arduino.h
#define columns FASTV_NONSENSE
#define lines FASTV_NONSENSE
#define bell FASTV_NONSENSE
#define tab FASTV_NONSENSE
#define major(device) FASTV_NONSENSE
#define minor(device) FASTV_NONSENSE
#define unix 1
#define linux 1
#define F(text) FASTV_NONSENSE
#define B0 0
#define B1 1
#define sq(x) ((x) * (x))
#define bit(b) (1UL << (b))
