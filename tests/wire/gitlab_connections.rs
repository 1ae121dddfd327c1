//! Connections to GitLab: early answers, cut bodies, time limits, pooling, proxies.

use crate::gitlab_server::{
    PATIENCE, Reply, Request, Server, Wire, answer, every_text, open, plain, sockets_to, soon, until,
};
use crate::gitlab_uploads::{fed, piece};
use bytes::Bytes;
use dayfly::gitlab::transport::full;
use dayfly::gitlab::{
    Body, Call, Connection, Endpoint, OpenTransport as _, ProxyEnvironment, RealLimits, RealOpenTransport, Transport,
    TransportError,
};
use http::Method;
use http_body_util::BodyExt as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::time::Instant;
use url::Url;

fn call(method: Method, path: &str, body: Body, head: Duration, total: Duration) -> Call {
    let request = http::Request::builder().method(method).uri(path).body(body).unwrap();
    Call { request, connection: Connection::Shared, head_timeout: head, total_timeout: total }
}

fn get(path: &str) -> Call {
    call(Method::GET, path, full(""), PATIENCE, PATIENCE)
}

/// G8: a refused connection and a name without address are told, with what to look at.
#[tokio::test]
async fn a_gitlab_that_is_not_there_is_named() {
    let gone = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let check = async |url: &str, hint: &str| {
        let error = soon(plain(&Url::parse(url).unwrap()).call(get("/x"))).await.map(|_| ()).unwrap_err();
        let (text, explained) = (every_text(&error), error.explain().unwrap_or_default());
        assert!(matches!(error, TransportError::Connect(_)) && explained.contains(hint), "{text} / {explained}");
    };
    check(&format!("http://{gone}"), "nothing listens there").await;
    check("http://no-such-host.invalid", "does not resolve").await;
}

/// G8: a connection that nobody takes is given up at its limit.
#[tokio::test]
async fn a_black_hole_is_given_up_at_its_limit() {
    // A listener whose queue is full answers no further SYN.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    let _listener = socket.listen(1).unwrap();
    let mut queued = Vec::new();
    while let Ok(Ok(stream)) =
        tokio::time::timeout(Duration::from_millis(300), tokio::net::TcpStream::connect(address)).await
    {
        queued.push(stream);
    }
    let limits = RealLimits { connect: Duration::from_millis(400), ..RealLimits::default() };
    let endpoint = Endpoint {
        url: Url::parse(&format!("http://{address}")).unwrap(),
        tls_ca_file: None,
        tls_client: None,
        allow_insecure_http: true,
    };
    let started = Instant::now();
    let error = soon(open(limits, &endpoint).call(call(Method::GET, "/x", full(""), PATIENCE, PATIENCE)))
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(matches!(error, TransportError::Connect(_)), "{}", every_text(&error));
    assert!(
        (Duration::from_millis(400)..Duration::from_secs(5)).contains(&started.elapsed()),
        "{:?}",
        started.elapsed()
    );
}

/// G10: a head that does not come is given up, counted from the end of the request's body.
#[tokio::test]
async fn a_slow_head_is_given_up_after_the_body() {
    let server = Server::answering(|_| Reply::Hang(b"HTTP/1.1 200 OK\r\nContent-Le".to_vec())).await;
    let transport = plain(&server.url());
    let hurried = call(Method::GET, "/x", full(""), Duration::from_millis(300), PATIENCE);
    let started = Instant::now();
    let error = soon(transport.call(hurried)).await.map(|_| ()).unwrap_err();
    assert!(matches!(error, TransportError::Timeout(limit) if limit == Duration::from_millis(300)));
    assert!(started.elapsed() < Duration::from_secs(5));
    until(|| sockets_to(server.address.port()) == 0).await;

    // A body that takes longer than the limit of the head is no reason to give up.
    let server = Server::answering(|_| answer(200, "", "")).await;
    let (guest, body) = fed();
    let sending = async {
        for _ in 0..6 {
            guest.send(piece(10)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        // Kept, so that it does not break off: a body of known length ends by itself.
        guest
    };
    let sized = http_body_util::Limited::new(body, 60);
    let mut put = call(Method::PUT, "/x", sized.boxed_unsync(), Duration::from_secs(1), PATIENCE);
    put.request.headers_mut().insert("content-length", 60.into());
    let started = Instant::now();
    let transport = plain(&server.url());
    let (answered, _guest) = soon(async { tokio::join!(transport.call(put), sending) }).await;
    assert_eq!(answered.unwrap().status(), 200);
    assert!(started.elapsed() > Duration::from_secs(1));
}

/// G10, T27: a body that stops, or drips, is given up at its limit.
#[tokio::test]
async fn a_slow_body_is_given_up() {
    let server = Server::answering(|_| Reply::Hang(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc".to_vec())).await;
    let limits = RealLimits { read_idle: Duration::from_millis(200), ..RealLimits::default() };
    let endpoint = Endpoint { url: server.url(), tls_ca_file: None, tls_client: None, allow_insecure_http: true };
    let answered = soon(open(limits, &endpoint).call(get("/x"))).await.unwrap();
    let error = soon(answered.into_body().collect()).await.map(|_| ()).unwrap_err();
    assert!(
        matches!(error.downcast_ref(), Some(TransportError::Timeout(limit)) if *limit == Duration::from_millis(200)),
        "{error}"
    );
    until(|| sockets_to(server.address.port()) == 0).await;

    let dripping = Server::raw(|stream, _, _| {
        Box::pin(async move {
            let mut wire = Wire::new(stream);
            wire.head().await.unwrap();
            wire.stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n").await.unwrap();
            while wire.stream.write_all(b"x").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
    })
    .await;
    let get = call(Method::GET, "/x", full(""), PATIENCE, Duration::from_millis(400));
    let answered = soon(plain(&dripping.url()).call(get)).await.unwrap();
    let started = Instant::now();
    let error = soon(answered.into_body().collect()).await.map(|_| ()).unwrap_err();
    assert!(
        matches!(error.downcast_ref(), Some(TransportError::Timeout(limit)) if *limit == Duration::from_millis(400)),
        "{error}"
    );
    assert!(started.elapsed() < Duration::from_secs(5));
}

/// G10: a reader that takes its time is not GitLab being idle.
#[tokio::test]
async fn a_slow_reader_is_not_an_idle_gitlab() {
    let server = Server::answering(|_| answer(200, "", vec![b'x'; 1 << 20])).await;
    let limits = RealLimits { read_idle: Duration::from_millis(500), ..RealLimits::default() };
    let endpoint = Endpoint { url: server.url(), tls_ca_file: None, tls_client: None, allow_insecure_http: true };
    let mut body = soon(open(limits, &endpoint).call(get("/x"))).await.unwrap().into_body();
    let (mut read, mut pauses) = (0, 0);
    while let Some(frame) = soon(body.frame()).await {
        read += frame.unwrap().into_data().unwrap().len();
        if pauses < 2 {
            pauses += 1;
            tokio::time::sleep(Duration::from_millis(700)).await;
        }
    }
    assert_eq!(read, 1 << 20);
}

/// G11: a kept connection that GitLab closes meanwhile costs the next call nothing.
#[tokio::test]
async fn a_stale_connection_is_replaced() {
    let server = Server::answering(|_| {
        let Reply::Keep(bytes) = answer(200, "", "ok") else { unreachable!() };
        Reply::Close(bytes)
    })
    .await;
    let transport = plain(&server.url());
    for _ in 0..50 {
        let answered = soon(transport.call(get("/x"))).await.unwrap();
        soon(answered.into_body().collect()).await.unwrap();
        // The close has arrived, so the connection is known to be gone before it is used again.
        until(|| sockets_to(server.address.port()) == 0).await;
    }
    assert_eq!(server.connections(), 50);
}

#[tokio::test]
async fn shared_connections_are_reused_until_the_pool_is_old() {
    let server = Server::answering(|_| answer(200, "", "ok")).await;
    let limits = RealLimits { pool_age: Duration::from_secs(2), ..RealLimits::default() };
    let endpoint = Endpoint { url: server.url(), tls_ca_file: None, tls_client: None, allow_insecure_http: true };
    let transport = open(limits, &endpoint);
    let once = async || soon(soon(transport.call(get("/x"))).await.unwrap().into_body().collect()).await.unwrap();
    once().await;
    once().await;
    assert_eq!(server.connections(), 1);
    tokio::time::sleep(Duration::from_millis(2100)).await;
    once().await;
    assert_eq!(server.connections(), 2);
    until(|| sockets_to(server.address.port()) == 1).await;
}

/// A proxy: answers CONNECT by a tunnel to `target`, everything else by itself.
async fn proxy(target: std::net::SocketAddr) -> Server {
    Server::raw(move |stream, _, seen| {
        Box::pin(async move {
            let mut wire = Wire::new(stream);
            let Some(mut request) = wire.head().await else { return };
            let connect = request.line.starts_with("CONNECT ");
            if !connect {
                wire.body(&mut request).await;
            }
            seen.lock().unwrap().requests.push(request);
            if connect {
                wire.stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                let mut upstream = tokio::net::TcpStream::connect(target).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut wire.stream, &mut upstream).await;
            } else {
                let _ = wire.stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nproxy").await;
            }
        })
    })
    .await
}

fn through(environment: ProxyEnvironment, endpoint: &Endpoint) -> Arc<dyn Transport> {
    RealOpenTransport::new(RealLimits::default(), environment).open(endpoint).unwrap()
}

async fn text_of(transport: &Arc<dyn Transport>) -> Bytes {
    let answered = soon(transport.call(get("/x"))).await.unwrap_or_else(|error| panic!("{}", every_text(&error)));
    soon(answered.into_body().collect()).await.unwrap().to_bytes()
}

#[tokio::test]
async fn the_proxy_environment_is_honoured_with_its_exceptions() {
    let server = Server::answering(|_: &Request| answer(200, "", "direct")).await;
    let proxy = proxy(server.address).await;
    let endpoint = Endpoint { url: server.url(), tls_ca_file: None, tls_client: None, allow_insecure_http: true };
    let url = format!("http://user:secret@{}", proxy.address);
    let with = |none: Option<&str>| ProxyEnvironment {
        http: Some(url.clone()),
        none: none.map(str::to_owned),
        ..ProxyEnvironment::default()
    };

    assert_eq!(text_of(&through(with(None), &endpoint)).await, "proxy");
    let request = proxy.request();
    assert_eq!(request.line, format!("GET http://{}/x HTTP/1.1", server.address));
    assert_eq!(request.all("proxy-authorization"), ["Basic dXNlcjpzZWNyZXQ="]);
    for none in ["127.0.0.1", "127.0.0.0/8", "*", "gitlab.example, *", "gitlab.example, 127.0.0.1"] {
        assert_eq!(text_of(&through(with(Some(none)), &endpoint)).await, "direct", "{none}");
    }
    assert_eq!(text_of(&through(with(Some("example.com")), &endpoint)).await, "proxy");
    let all = ProxyEnvironment { all: Some(url.clone()), ..ProxyEnvironment::default() };
    assert_eq!(text_of(&through(all, &endpoint)).await, "proxy");
    let https = ProxyEnvironment { https: Some(url.clone()), ..ProxyEnvironment::default() };
    assert_eq!(text_of(&through(https, &endpoint)).await, "direct", "HTTPS_PROXY is not for http");

    let dead =
        ProxyEnvironment { http: Some("http://user:secret@127.0.0.1:1".to_owned()), ..ProxyEnvironment::default() };
    let error = soon(through(dead, &endpoint).call(get("/x"))).await.map(|_| ()).unwrap_err();
    assert!(!every_text(&error).contains("secret"), "{}", every_text(&error));
}
