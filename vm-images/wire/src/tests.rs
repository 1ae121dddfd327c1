//! Both ends over pipes in memory and over sockets; what a hostile or a broken other side does.

mod ends;
mod streams;
