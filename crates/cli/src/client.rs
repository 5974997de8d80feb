//! HTTP on the agent's Unix socket. Every wait has a deadline; every answer has a longest length.

use crate::exit::{Exit, Failure};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, ErrorKind};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::time::Duration;
use sterna_agent::api::IDLE_BEAT;
use sterna_agent::model::{MigrationView, Problem, WorkingSetEvent, WorkingSetRequest};
use tokio::net::UnixStream;

/// The agent accepts at once or not at all.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// The slowest requests start a QEMU or ask a peer's agent to check a VM.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);

/// Longest answer: thousands of VMs with their command lines.
const ANSWER_MAX: usize = 64 << 20;

/// Longest line of a stream of views; a view has a few kilobytes.
const LINE_MAX: usize = 1 << 20;

/// A stream is dead when this many beats in a row did not come.
const BEATS_MISSED: u32 = 3;

/// Why the agent did not answer as asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// Nothing was asked of it: it cannot be reached.
    #[error("{}", unreachable(socket, source))]
    Unreachable { socket: PathBuf, source: io::Error },
    /// It was asked and did not answer: whether it did it is not known.
    #[error("the agent at {} did not answer ({why}): `sterna ps` shows what it has done", socket.display())]
    Silent { socket: PathBuf, why: String },
    /// It refused.
    #[error("{}", .0.detail)]
    Problem(Problem),
    /// Its answer makes no sense: another program or version.
    #[error("what answers at {} is no agent of this version ({why}): see `sterna --version`", socket.display())]
    Nonsense { socket: PathBuf, why: String },
}

impl ClientError {
    /// True when the agent says that there is no such thing.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Problem(problem) if problem.status == 404)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let text = error.to_string();
        let ClientError::Problem(problem) = error else {
            let exit =
                if matches!(error, ClientError::Unreachable { .. }) { Exit::Usage } else { Exit::Failed };
            return Self::new(exit, text);
        };
        let exit = match problem.status {
            422 => Exit::Refused,
            409 => Exit::Failed,
            400..500 => Exit::Usage,
            _ => Exit::Failed,
        };
        Self { exit, text, reasons: problem.reasons }
    }
}

fn unreachable(socket: &Path, why: &io::Error) -> String {
    let socket = socket.display();
    match why.kind() {
        ErrorKind::NotFound => format!(
            "no agent at {socket}: start one with `sterna agent --config FILE`, or name its socket by --socket or \
             STERNA_SOCKET"
        ),
        ErrorKind::ConnectionRefused => {
            format!("the agent of {socket} does not run: start it with `sterna agent --config FILE`")
        }
        ErrorKind::PermissionDenied => {
            format!("{socket} may be opened by the agent's own user only: run this as that user or as root")
        }
        _ => format!("the agent at {socket} cannot be reached: {why}"),
    }
}

/// A client of one agent. Each request has a connection of its own: they cost microseconds, and never share a fate.
#[derive(Clone)]
pub(crate) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Reads something.
    pub(crate) async fn fetch<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.parse(&self.call(Method::GET, path, Bytes::new(), None).await?)
    }

    /// Sends something, and reads what became of it.
    pub(crate) async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        key: Option<&str>,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|why| self.nonsense(why))?;
        self.parse(&self.call(method, path, body.into(), key).await?)
    }

    /// Sends something that is answered by a yes.
    pub(crate) async fn submit(&self, path: &str, body: &impl Serialize) -> Result<(), ClientError> {
        let body = serde_json::to_vec(body).map_err(|why| self.nonsense(why))?;
        self.call(Method::POST, path, body.into(), None).await.map(drop)
    }

    /// Ends something.
    pub(crate) async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.call(Method::DELETE, path, Bytes::new(), None).await.map(drop)
    }

    /// A migration's views as they change.
    pub(crate) async fn views(&self, id: &str) -> Result<Views<MigrationView>, ClientError> {
        let path = format!("/v1/migrations/{}/events", segment(id));
        let response = self.answer(Method::GET, &path, Bytes::new(), None).await?;
        Ok(Views::of(response))
    }

    /// What a measurement of a VM's working set tells. It lasts as long as this is kept.
    pub(crate) async fn measure(
        &self,
        vm: &str,
        request: &WorkingSetRequest,
    ) -> Result<Views<WorkingSetEvent>, ClientError> {
        let path = format!("/v1/vms/{}/working-set", segment(vm));
        let body = serde_json::to_vec(request).map_err(|why| self.nonsense(why))?;
        Ok(Views::of(self.answer(Method::POST, &path, body.into(), None).await?))
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        key: Option<&str>,
    ) -> Result<Bytes, ClientError> {
        let response = self.answer(method, path, body, key).await?;
        self.collect(response).await
    }

    /// The answer's head, once it is a good one.
    async fn answer(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        key: Option<&str>,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "agent")
            .header("accept", "application/jsonl, application/json");
        if !body.is_empty() {
            request = request.header("content-type", "application/json");
        }
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let request = request.body(Full::new(body)).map_err(|why| self.nonsense(why))?;
        let exchange = self.exchange(request);
        let response =
            tokio::time::timeout(ANSWER_DEADLINE, exchange).await.map_err(|_| self.silent("too late"))??;
        match response.status().is_success() {
            true => Ok(response),
            false => Err(self.refusal(response).await),
        }
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, ClientError> {
        let late = |_| io::Error::from(ErrorKind::TimedOut);
        let connect = tokio::time::timeout(CONNECT_DEADLINE, UnixStream::connect(&self.socket));
        let stream = connect
            .await
            .map_err(late)
            .flatten()
            .map_err(|source| ClientError::Unreachable { socket: self.socket.clone(), source })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|why| self.silent(why))?;
        // Its error is the exchange's or the body's as well, where it is handled.
        tokio::spawn(async move { drop(connection.await) });
        sender.send_request(request).await.map_err(|why| self.silent(why))
    }

    async fn refusal(&self, response: Response<Incoming>) -> ClientError {
        let status = response.status();
        match self.collect(response).await {
            Err(error) => error,
            Ok(body) => match serde_json::from_slice(&body) {
                Ok(problem) => ClientError::Problem(problem),
                Err(_) => self.unexplained(status),
            },
        }
    }

    fn unexplained(&self, status: StatusCode) -> ClientError {
        self.nonsense(format!("it says {status} and nothing more"))
    }

    async fn collect(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = Limited::new(response.into_body(), ANSWER_MAX).collect();
        let body = tokio::time::timeout(ANSWER_DEADLINE, body).await.map_err(|_| self.silent("too late"))?;
        body.map(http_body_util::Collected::to_bytes).map_err(|why| self.silent(why))
    }

    fn parse<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(body).map_err(|why| self.nonsense(why))
    }

    fn silent(&self, why: impl ToString) -> ClientError {
        ClientError::Silent { socket: self.socket.clone(), why: why.to_string() }
    }

    fn nonsense(&self, why: impl ToString) -> ClientError {
        ClientError::Nonsense { socket: self.socket.clone(), why: why.to_string() }
    }
}

/// A stream of views, one JSON document per line. Empty lines are beats.
pub(crate) struct Views<T> {
    body: Incoming,
    buffer: Vec<u8>,
    of: PhantomData<T>,
}

impl<T: DeserializeOwned> Views<T> {
    fn of(response: Response<Incoming>) -> Self {
        Self { body: response.into_body(), buffer: Vec::new(), of: PhantomData }
    }

    /// The next view; nothing when the stream ended as it should.
    ///
    /// May be dropped while it waits: what arrived is kept.
    ///
    /// # Errors
    /// A text when the stream broke or fell silent.
    pub(crate) async fn next(&mut self) -> Result<Option<T>, String> {
        loop {
            while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if end > 0 {
                    return serde_json::from_slice(&line).map(Some).map_err(|why| why.to_string());
                }
            }
            if self.buffer.len() > LINE_MAX {
                return Err("a view without an end".to_owned());
            }
            let frame = tokio::time::timeout(IDLE_BEAT * BEATS_MISSED, self.body.frame());
            match frame.await.map_err(|_| "it fell silent".to_owned())? {
                None => return Ok(None),
                Some(Err(why)) => return Err(why.to_string()),
                Some(Ok(frame)) => self.buffer.extend(frame.into_data().unwrap_or_default()),
            }
        }
    }
}

/// A name as one segment of a path (RFC 3986: everything but the unreserved is escaped).
pub(crate) fn segment(name: &str) -> String {
    use std::fmt::Write;
    name.bytes().fold(String::new(), |mut path, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' => path.push(byte.into()),
            b'.' if !matches!(name, "." | "..") => path.push('.'),
            // Writing to a string cannot fail.
            _ => drop(write!(path, "%{byte:02X}")),
        }
        path
    })
}

#[cfg(test)]
mod tests {
    use super::segment;

    #[test]
    fn a_name_cannot_leave_its_segment() {
        assert_eq!(segment("web-1.example"), "web-1.example");
        assert_eq!(segment("a/b?c#d e%"), "a%2Fb%3Fc%23d%20e%25");
        assert_eq!(segment(".."), "%2E%2E");
        assert_eq!(segment("ü"), "%C3%BC");
    }
}
