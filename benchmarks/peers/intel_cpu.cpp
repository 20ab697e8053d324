// MKL asks this function whether it may use all of the CPU's vector instructions.
extern "C" int mkl_serv_intel_cpu_true() { return 1; }
