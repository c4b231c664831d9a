"""What all ops share: the record of one, the choice of a backend, custom ops, the C++ library, Triton where it is."""
