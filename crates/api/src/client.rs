//! A client that blocks: what commands need.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::Method;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;

use crate::http::{Ask, send, whole};
use crate::types::{
    ApiError, BalloonRequest, ConsoleSize, CpuRequest, DiskSizeRequest, EngineStats, Event, ExplainQuery,
    Explanation, FreezeAnswer, MemoryMap, MemoryRequest, Moved, ReclaimRequest, Reclaimed, StopRequest,
    StoreFileRequest, VmInfo, VmStats,
};

/// How long a VM has to answer a request that it can answer at once.
const PATIENCE: Duration = Duration::from_secs(5);
/// The protocol of `GET /console`.
pub(crate) const CONSOLE_PROTOCOL: &str = "berth-console";

/// Why a VM does not answer, or not as hoped. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("cannot connect to the VM at {}: {source}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The VM says no.
    #[error("{error}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// Why.
        error: ApiError,
    },
    /// The VM does not answer.
    #[error("the VM does not answer within {} s", PATIENCE.as_secs())]
    TimedOut,
    /// The connection broke.
    #[error("the connection to the VM broke: {0}")]
    Http(#[from] hyper::Error),
    /// The answer makes no sense.
    #[error("the VM's answer makes no sense: {0}")]
    Answer(String),
    /// The host.
    #[error("the host refuses what a connection needs: {0}")]
    Host(#[source] io::Error),
}

/// One VM's API.
pub struct Client {
    socket: PathBuf,
    runtime: Runtime,
}

fn runtime() -> Result<Runtime, ClientError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ClientError::Host)
}

async fn patient<T>(answer: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
    tokio::time::timeout(PATIENCE, answer).await.unwrap_or(Err(ClientError::TimedOut))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(body).map_err(|e| ClientError::Answer(e.to_string()))
}

async fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, ClientError> {
    parse(&whole(send(socket, Ask::new(Method::GET, path)).await?).await?)
}

/// What many VMs answer to `GET path`, each within `limit`, asked at once.
///
/// # Errors
/// [`ClientError::Host`]; what single VMs say is in the list.
pub fn ask_all<T: DeserializeOwned + Send + 'static>(
    sockets: &[PathBuf],
    path: &'static str,
    limit: Duration,
) -> Result<Vec<Result<T, ClientError>>, ClientError> {
    Ok(runtime()?.block_on(async {
        let ask = |socket: PathBuf| async move {
            let answer = tokio::time::timeout(limit, get(&socket, path)).await;
            answer.unwrap_or(Err(ClientError::TimedOut))
        };
        let tasks: Vec<_> = sockets.iter().map(|socket| tokio::spawn(ask(socket.clone()))).collect();
        let mut answers = Vec::with_capacity(tasks.len());
        for task in tasks {
            answers.push(task.await.unwrap_or_else(|e| Err(ClientError::Answer(e.to_string()))));
        }
        answers
    }))
}

impl Client {
    /// A client of the VM whose API is at `socket`. Connects only when something is asked.
    ///
    /// # Errors
    /// [`ClientError::Host`].
    pub fn new(socket: PathBuf) -> Result<Self, ClientError> {
        Ok(Self { socket, runtime: runtime()? })
    }

    /// `GET path`, for routes that have no method here.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.runtime.block_on(patient(get(&self.socket, path)))
    }

    /// `GET path` as text.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn get_text(&self, path: &str) -> Result<String, ClientError> {
        let body = self.runtime.block_on(patient(async {
            whole(send(&self.socket, Ask::new(Method::GET, path)).await?).await
        }))?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// A request with a body and without an answer, for routes that have no method here.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn put(&self, method: Method, path: &str, body: &impl Serialize) -> Result<(), ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| ClientError::Answer(e.to_string()))?;
        self.runtime.block_on(patient(async {
            whole(send(&self.socket, Ask { body: Some(body), ..Ask::new(method, path) }).await?).await
        }))?;
        Ok(())
    }

    /// `POST path` without a body.
    fn post(&self, path: &str) -> Result<(), ClientError> {
        self.runtime.block_on(patient(async {
            whole(send(&self.socket, Ask::new(Method::POST, path)).await?).await
        }))?;
        Ok(())
    }

    /// What the VM is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn vm(&self) -> Result<VmInfo, ClientError> {
        self.get("/vm")
    }

    /// What it uses.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn stats(&self) -> Result<VmStats, ClientError> {
        self.get("/stats")
    }

    /// What its engine counted.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn engine(&self) -> Result<EngineStats, ClientError> {
        self.get("/engine")
    }

    /// Where an address of the guest leads.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when there is no such address, vCPU or process.
    pub fn explain(&self, query: &ExplainQuery) -> Result<Explanation, ClientError> {
        self.get(&format!("/explain?{}", query.to_query()))
    }

    /// A map of guest memory by page state.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when the size of chunks is not possible.
    pub fn memory_map(&self, chunk_bytes: Option<u64>) -> Result<MemoryMap, ClientError> {
        match chunk_bytes {
            Some(bytes) => self.get(&format!("/map?chunk_bytes={bytes}")),
            None => self.get("/map"),
        }
    }

    /// Stops vCPUs, devices and the guest's clock. Done when it returns; a VM that is paused stays so.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn pause(&self) -> Result<(), ClientError> {
        self.post("/pause")
    }

    /// Lets a paused VM go on. A VM that runs goes on running.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn resume(&self) -> Result<(), ClientError> {
        self.post("/resume")
    }

    /// Presses the reset button: the VM boots again.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn reset(&self) -> Result<(), ClientError> {
        self.post("/reset")
    }

    /// Presses the ACPI power button.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when the guest does not watch it.
    pub fn power_button(&self) -> Result<(), ClientError> {
        self.post("/power-button")
    }

    /// Asks the guest to power off, and ends it when it has not within that time. Returns at once.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn stop(&self, timeout_seconds: u32) -> Result<(), ClientError> {
        self.put(Method::POST, "/stop", &StopRequest { timeout_seconds })
    }

    /// Ends the VM at once, whatever its guest does.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn kill(&self) -> Result<(), ClientError> {
        self.post("/kill")
    }

    /// Asks the guest to give memory back until it has given `target_bytes`.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when there is no balloon.
    pub fn set_balloon(&self, target_bytes: u64) -> Result<(), ClientError> {
        self.put(Method::PUT, "/balloon", &BalloonRequest { target_bytes })
    }

    /// Changes how much CPU time the VM gets.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when the host does not let it, or there is no such weight or limit.
    pub fn set_cpu(&self, request: &CpuRequest) -> Result<(), ClientError> {
        self.put(Method::PUT, "/cpu", request)
    }

    /// Takes up to `bytes` of guest memory that is not in use for `idle_seconds` to the cold store, and waits that long.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when the VM's host or engine lacks what it needs.
    pub fn reclaim(&self, bytes: u64, idle_seconds: u32) -> Result<Reclaimed, ClientError> {
        self.long_post("/reclaim", &ReclaimRequest { bytes, idle_seconds })
    }

    /// A request that takes as long as it takes: pages of many gigabytes may have to be compressed.
    fn long_post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| ClientError::Answer(e.to_string()))?;
        let answer = self.runtime.block_on(async {
            let ask = Ask { body: Some(body), ..Ask::new(Method::POST, path) };
            whole(send(&self.socket, ask).await?).await
        })?;
        parse(&answer)
    }

    /// Changes what the VM may have of the host's memory.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when that is not possible.
    pub fn set_memory(&self, request: &MemoryRequest) -> Result<(), ClientError> {
        self.put(Method::PUT, "/memory", request)
    }

    /// Moves what the cold store has in memory to its file: at least `bytes` if there are as many.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when the file cannot be written.
    pub fn move_store_to_file(&self, bytes: u64) -> Result<Moved, ClientError> {
        self.long_post("/store/file", &StoreFileRequest { bytes })
    }

    /// Lets the VM stand still with its memory in the cold store, until it is used or thawed.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when it does not run, or the host lacks what it needs.
    pub fn freeze(&self) -> Result<FreezeAnswer, ClientError> {
        let answer = self
            .runtime
            .block_on(async { whole(send(&self.socket, Ask::new(Method::POST, "/freeze")).await?).await })?;
        parse(&answer)
    }

    /// Lets a frozen VM go on. Does nothing to one that is not.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn thaw(&self) -> Result<(), ClientError> {
        self.post("/thaw")
    }

    /// Makes the disk `id` larger.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when there is no such disk, or it cannot be.
    pub fn resize_disk(&self, id: &str, size_bytes: u64) -> Result<(), ClientError> {
        self.put(Method::PUT, &format!("/disks/{id}/size"), &DiskSizeRequest { size_bytes })
    }

    /// Tells the VM how large the terminal at its console is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn set_console_size(&self, columns: u16, rows: u16) -> Result<(), ClientError> {
        self.put(Method::PUT, "/console/size", &ConsoleSize { columns, rows })
    }

    /// Attaches to the console: a stream of what it prints, beginning with what it printed last, into which input is
    /// written.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn console(&self) -> Result<ConsoleStream, ClientError> {
        let _inside = self.runtime.enter();
        self.runtime.block_on(patient(async {
            let ask = Ask { upgrade: Some(CONSOLE_PROTOCOL), ..Ask::new(Method::GET, "/console") };
            let upgraded = hyper::upgrade::on(send(&self.socket, ask).await?).await?;
            let parts = upgraded
                .downcast::<TokioIo<tokio::net::UnixStream>>()
                .map_err(|_| ClientError::Answer("it is no stream".to_owned()))?;
            let stream = parts.io.into_inner().into_std().map_err(ClientError::Host)?;
            stream.set_nonblocking(false).map_err(ClientError::Host)?;
            Ok(ConsoleStream { first: parts.read_buf.to_vec(), stream })
        }))
    }

    /// The events that the VM still has after the one with the number `after`, and, if `follow`, what happens from now on.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn events(&self, after: u64, follow: bool) -> Result<EventStream<'_>, ClientError> {
        let path = format!("/events?after={after}&follow={follow}");
        let answer = self.runtime.block_on(patient(send(&self.socket, Ask::new(Method::GET, &path))))?;
        Ok(EventStream { client: self, body: answer.into_body(), text: Vec::new() })
    }
}

/// A console: reads give what it prints.
#[derive(Debug)]
pub struct ConsoleStream {
    /// What came with the answer's head.
    first: Vec<u8>,
    stream: UnixStream,
}

impl ConsoleStream {
    /// The connection, to write to and to close. What is read from it misses what is read here first.
    ///
    /// # Errors
    /// What the host says.
    pub fn writer(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }
}

impl Read for ConsoleStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.first.is_empty() {
            return self.stream.read(buffer);
        }
        let n = self.first.as_slice().read(buffer)?;
        self.first.drain(..n);
        Ok(n)
    }
}

/// Events as they happen; ends with the VM.
pub struct EventStream<'a> {
    client: &'a Client,
    body: Incoming,
    text: Vec<u8>,
}

impl Iterator for EventStream<'_> {
    type Item = Result<Event, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            // An event is some lines and an empty one (HTML, 9.2.6); ours has its JSON in one line.
            while let Some(end) = self.text.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.text.drain(..=end).collect();
                if let Some(json) = line.strip_prefix(b"data:") {
                    return Some(parse(json));
                }
            }
            match self.client.runtime.block_on(self.body.frame())? {
                Ok(frame) => self.text.extend(frame.into_data().unwrap_or_default()),
                Err(e) => return Some(Err(e.into())),
            }
        }
    }
}
