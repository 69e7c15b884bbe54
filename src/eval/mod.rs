//! What a cache costs in quality: questions with known answers, and text forced through the model token by token. Pure but
//! for the asking, which goes through one [`ask::Transport`].
//!
//! ```text
//! seed -> tasks -> questions -> run --transport--> a server, in this process or not
//!                                   <- answers -> score -> cells -> report
//! text -> tokens -> sequences -> forced: exact cache beside compressed ones -> blocks -> score -> report
//! ```

pub mod ask;
pub mod forced;
pub mod http;
pub mod report;
pub mod run;
pub mod score;
pub mod tasks;
mod topics;
mod words;
