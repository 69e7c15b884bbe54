
mod ops;
