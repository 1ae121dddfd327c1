//! What stands in for the world in dayfly's tests: no part of the product (decision D29).

pub mod fuzzing; // what must hold for any bytes?
