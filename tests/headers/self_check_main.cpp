// Runs the self-check; with -DFASTV_TWO, of two objects of self_check.cpp built with different flags.
#ifdef FASTV_TWO
int check_a();
int check_b();
int main() { return check_a() | check_b(); }
#else
int fastv_check();
int main() { return fastv_check(); }
#endif
