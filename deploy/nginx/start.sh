#!/bin/sh
# Starts nginx, which by itself would serve an expired certificate without a word.
certificate=${CERTIFICATE:-/run/secrets/tls_certificate}
temporary=${TEMPORARY:-/tmp}
if ! [ -r "$certificate" ]; then
    echo "nginx: the certificate in $certificate cannot be read by user $(id -u);" \
        "give the file to that user, or make it: docs/deploy.md, Certificates" >&2
    exit 1
fi
if ! openssl x509 -in "$certificate" -noout -checkend 0 >/dev/null 2>&1; then
    echo "nginx: the certificate in $certificate has expired, or is none;" \
        "put another one there: docs/deploy.md, Certificates" >&2
    exit 1
fi
rm -f "$temporary"/https_port.*
if [ "${HTTPS_PORT:-443}" != 443 ]; then
    echo "return 308 https://\$host:$HTTPS_PORT\$request_uri;" >"$temporary/https_port.conf"
fi
exec nginx -c "${CONFIG:-/etc/nginx/nginx.conf}" -g "daemon off;"
