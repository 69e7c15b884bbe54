mod pages;
mod scheduler;
mod sim;
