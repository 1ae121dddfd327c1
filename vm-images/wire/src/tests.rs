//! Both ends over pipes in memory and over sockets; what a hostile or a broken other side does.

mod dirty;
mod egress;
mod ends;
mod floods;
mod handshakes;
mod silence;
mod streams;
